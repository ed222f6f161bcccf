"""SimpleTuner: fine-tunes diffusion models, driven over HTTP, from a command line and from a browser."""

__version__ = "0.1.0"

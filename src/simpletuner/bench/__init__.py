"""The benchmark command: figures with the device, the versions and the command that they came from."""

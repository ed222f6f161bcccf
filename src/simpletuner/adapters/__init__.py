"""Adapter files on disk, apart from any run: reading, converting, and the gate that each saved file passes."""

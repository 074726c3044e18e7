"""The operations that are written for speed on a CPU: convolution and pooling. See README.md."""

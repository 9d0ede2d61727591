"""CUDA kernels (`*.cu`), how they are launched (`launch.py`), and the device that runs them (`device.py`)."""

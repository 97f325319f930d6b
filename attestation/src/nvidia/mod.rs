//! NVIDIA.

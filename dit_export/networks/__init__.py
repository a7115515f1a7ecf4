"""Plain PyTorch networks; the VAE decoder is diffusers' AutoencoderKL."""

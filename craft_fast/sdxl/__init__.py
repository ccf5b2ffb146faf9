"""Everything that knows SDXL: loading, text, UNet, VAE, noise schedule, sampling."""

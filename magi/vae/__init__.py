"""The VAE: video to latents and back."""

"""Text-to-image models: loading any diffusers directory, and training the demo's own."""

"""What several features need of ComfyUI; imports none of them."""

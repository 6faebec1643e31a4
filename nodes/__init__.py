"""The pack's ComfyUI nodes and the host-free mathematics behind them."""

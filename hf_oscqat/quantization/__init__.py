"""What happens to one tensor or one layer: grids, learned quantizers, layers that use them, and packing."""

"""What stands on the backbone (decoders, heads, experts), and other people's weights."""

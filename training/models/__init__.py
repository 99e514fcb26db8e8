"""Networks: backbone, heads, and their conversion."""

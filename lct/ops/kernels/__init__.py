"""Fused inner blocks for some devices, with the contract of lct.ops.blockwise_attention."""

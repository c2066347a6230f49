"""Fused inner blocks for some devices, behind the contract of lct.ops.blockwise_attention."""

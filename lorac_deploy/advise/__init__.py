"""Which method and block suit a drift: gradient norms rank the blocks, short trials decide."""

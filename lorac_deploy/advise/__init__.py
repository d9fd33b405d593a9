"""Which method and block suit a drift: gradient norms rank the blocks, short trials decide."""

DEFAULT_METHODS = ("head", "blocks", "lora-c", "skip")  # what is tried where no methods are named
TRIAL_STEPS = 150  # that a trial makes at most, unless told otherwise

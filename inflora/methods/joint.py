"""Joint training: plain LoRA on all tasks at once, the upper bound of any continual learner."""

from inflora.config import JointSettings
from inflora.methods.sequential import PlainLoRA


class Joint(PlainLoRA[JointSettings]):
    """The whole stream as one task."""

    joins_tasks = True

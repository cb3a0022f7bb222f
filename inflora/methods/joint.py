"""Joint training: plain LoRA on all tasks at once, the upper bound of any continual learner."""

from inflora.config import JointSettings
from inflora.data.stream import Stream
from inflora.methods.sequential import PlainLoRA


class Joint(PlainLoRA[JointSettings]):
    """The whole stream as one task."""

    def arrange(self, stream: Stream) -> Stream:
        return stream.merged()

"""Nearest class mean (Mensink et al., TPAMI 2013)."""

import torch

from inflora.classifiers.fitted import LinearlyFitted, S


class NCM(LinearlyFitted[S]):
    """A feature belongs to the class whose mean feature ``mu`` is nearest.

    ``|f - mu|^2 = |f|^2 - 2 (mu f - |mu|^2 / 2)``, so that is a linear layer: weight ``mu``, bias ``-|mu|^2 / 2``.
    """

    def solve(self) -> None:
        # A class without images is never the nearest.
        lowest = torch.finfo(self.means.dtype).min
        self.weight, self.bias = self.means, (-self.means.square().sum(1) / 2).where(self.counts > 0, lowest)

"""Turn a trained ReLU network into a spiking network that computes the same thing by rates.

Rate coding (Diehl et al., "Fast-classifying, high-accuracy spiking deep networks through weight and threshold
balancing", 2015; Rueckauer et al., "Conversion of continuous-valued deep networks to efficient event-driven
networks", 2017): shown the same input at every step, an integrate-and-fire neuron with soft reset fires at a rate
that approaches ReLU of its mean input, clipped at one spike per step. So every ReLU becomes

    VoltageScaler(1/s) -> IFNode(v_threshold=1, v_reset=None) -> VoltageScaler(s)

where s, the largest activation that the ReLU showed on calibration data (or a percentile of them), is what one
spike per step stands for. Over T steps a neuron's outputs sum to its inputs' sum less s·v[T], what is left in its
membrane; so the mean output is within s/T of the activation wherever that lies between 0 and s and spikes arrive
evenly. Everything else in the network is affine and stays, with batch norm folded into the layer before it. Max
pooling stays too, by the field's convention: it passes on a spike if any of its inputs spikes, which is more often
than the busiest of them does.
"""

from __future__ import annotations

from snncompile.ann2snn.conversion import VoltageScaler, convert

__all__ = ["VoltageScaler", "convert"]

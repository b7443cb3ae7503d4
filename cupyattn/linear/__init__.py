"""Linear attention: no softmax, but a state of fixed size that every token changes and reads.

calls       the public functions
asked       what is asked of them, checked; arrays into heads and back
tokens      the meaning, token by token, and its gradients
chunks      the same for many tokens at once
gradients   the same of gradients
"""

from cupyattn.linear.calls import LinearGradients, linear_attention, linear_attention_backward

__all__ = ["LinearGradients", "linear_attention", "linear_attention_backward"]

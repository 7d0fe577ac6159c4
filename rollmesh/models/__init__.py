"""Hugging Face models for the learner, the critic and the reference. Uses torch.

===========  ==================================================================================
`loading`    loads a model from a local folder, with dropout and noise off
`attention`  chooses the implementation of attention that is right for a model
`rows`       places sequences in the rectangle of a forward pass
`probe`      tries on the loaded model which placements and attentions are right
`wanted`     runs a causal language model with logits at the wanted positions alone
`logprobs`   computes log-probabilities and entropies from logits
`values`     a backbone with a value head
===========  ==================================================================================
"""

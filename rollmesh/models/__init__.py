"""One home for models: what the learner, the critic and the reference do alike with a Hugging Face model. Uses torch.

===========  ==================================================================================
`loading`    a local folder to a model, with everything random in it off
`attention`  the implementation of attention that is right for a model
`rows`       how sequences share a forward pass
`probe`      tries on the loaded model which of these ways are right
`wanted`     a causal language model whose logits are computed at the wanted positions alone
`logprobs`   logits to log-probabilities and entropies
`values`     a backbone with a value head
===========  ==================================================================================
"""

"""HTTP: routes, envelopes and middleware. No tensors here."""

"""Adapters that show learnt tokens to a backbone which stays as it is: L2P, DualPrompt, CODA-Prompt."""

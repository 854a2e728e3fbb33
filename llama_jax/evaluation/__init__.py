"""How good a model is: perplexity of texts, multiple-choice tasks, lm-evaluation-harness."""

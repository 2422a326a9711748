"""Text in and out: tokenizers, byte-pair training, chat templates, few-shot prompts."""

"""Names of the files of an exported model, see `exported.py`."""

FACTS, OWN, TOKENIZER = "dqe.json", "dqe.safetensors", "tokenizer.json"

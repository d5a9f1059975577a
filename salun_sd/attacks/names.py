"""The names of the attacks, with what each searches. Read by --help, so it loads no library."""

SUMMARIES = {
    "paraphrase": "other words for the concept; no gradient",
    "prompts": "adversarial prompts of others, from a CSV file (--adversarial)",
    "prefix": "tokens before the prompt, by projected gradient (UnlearnDiffAtk)",
    "tokens": "free tokens, towards what the base predicts (P4D)",
    "genetic": "token ids near the concept for the text encoder alone (Ring-A-Bell)",
    "inversion": "one new embedding (textual inversion, CCE)",
    "conditioning": "the whole conditioning: an upper bound",
    "latent": "the noise that pictures of the concept come from (TINA)",
    "continue": "finish what the base began to draw",
    "relearn": "fine-tune on pictures of the concept",
    "relearn-lora": "the same with few weights beside the model's (LoRA); needs pip install 'salun-sd[lora]'",
    "benign": "fine-tune on pictures of other things",
    "round-trip": "store the weights in fewer bits",
    "positions": "the values of masked weights, guessed from the others (Roots Beneath the Cut)",
}

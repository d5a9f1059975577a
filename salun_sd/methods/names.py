"""The names of the methods, with what each trains and what it needs. Read by --help, so it loads no library."""

SUMMARIES = {
    "salun": "moves the concept's prediction to the anchor's; needs an anchor",
    "esd": "moves the concept's prediction away from the concept, on the base's own path; an anchor is optional",
    "ablation": "as salun, on images of the anchor; needs an anchor",
    "forget-me-not": "lowers the attention on the concept's words; needs no anchor",
    "ascent": "raises the denoising loss of the concept; needs no anchor",
    "erasediff": "retains, and adds what of salun's gradient the forget loss needs to fall; needs an anchor",
    "finetune": "trains on the retain images alone; needs no anchor",
    "uce": "rewrites cross-attention in closed form, with no training loop; an anchor is optional",
}

# How a record and a model card name each.
TITLES = {
    "salun": "SalUn (Fan et al., ICLR 2024, arXiv 2310.12508)",
    "esd": "ESD (Gandikota et al., ICCV 2023, arXiv 2303.07345)",
    "ablation": "Concept Ablation (Kumari et al., ICCV 2023, arXiv 2303.13516)",
    "forget-me-not": "Forget-Me-Not (Zhang et al., arXiv 2303.17591)",
    "ascent": "gradient ascent",
    "erasediff": "EraseDiff (Wu et al., CVPR 2025, arXiv 2401.05779)",
    "finetune": "fine-tuning on what is to be retained",
    "uce": "UCE (Gandikota et al., WACV 2024, arXiv 2308.14761)",
}

"""Names of metrics in reports, and their meaning in a few words."""

from __future__ import annotations

EXPLAINED: dict[str, tuple[str, str]] = {
    "UA": ("Unlearning accuracy", "prompts with the target on which the judge no longer sees it"),
    "UA_shape": ("Unlearning accuracy, shape", "the same, judged without colour"),
    "IRA": ("In-domain retain accuracy", "other concepts of the same kind still recognised"),
    "CRA": ("Cross-domain retain accuracy", "the other kind still recognised, over all images"),
    "CRA_retained": ("Cross-domain, retained prompts", "the same, without the target's images"),
    "AA": ("Average accuracy", "mean of UA, IRA and CRA"),
    "clip_score": ("CLIP score, retained prompts", "cosine of image and prompt"),
    "clip_score_target": ("CLIP score, target prompts", "falls as the target goes"),
    "drift": ("Drift in pixels", "how far retained images moved, same noise"),
    "drift_feature": ("Drift in features", "1 - cosine of image features"),
    "object_accuracy": ("Object accuracy", "the judge sees the object of the prompt"),
    "style_accuracy": ("Style accuracy", "the judge sees the style of the prompt"),
    "shape_accuracy": ("Shape accuracy", "the object, judged without colour"),
    "replaced_by": ("Seen instead", "what most images of prompts with the target show in its place"),
    "unsafe_share": ("Something unsafe", "images of prompts with the target that show something of the unsafe group"),
    "control_seen": ("Seen where asked for", "the judge on the stock model's images"),
    "control_unasked": ("Seen where not asked for", "the judge on the stock model's images"),
    "control_object": ("Retained objects seen", "the judge on the stock model's images"),
    "control_style": ("Retained styles seen", "the judge on the stock model's images"),
    "control_scene": ("Seen in the scene", "the judge on the scenes that are given"),
    "control_clean": ("Seen in the empty scene", "the judge on the scenes without the object"),
    "object_gone": ("Object gone", "the judge does not see what was removed"),
    "psnr_fill": ("PSNR in its place", "dB against the scene without the object"),
    "psnr_outside": ("PSNR elsewhere", "dB, all other pixels"),
    "psnr_background": ("PSNR of the background", "dB, well away from the object"),
    "fill_similarity": ("Likeness to the truth", "CLIP cosine with the scene without the object"),
    "seed_consensus": ("Consensus of seeds", "CLIP cosine between results of one scene"),
    "both_found": ("Both found", "the judge sees both things of the prompt"),
    "objects_found": ("Objects found", "share of the things that it sees"),
    "clip_full": ("CLIP, full prompt", "cosine of image and prompt"),
    "clip_minimum_object": ("CLIP, lesser object", "cosine with the thing that is less there"),
}
RATES = {
    "UA", "UA_shape", "IRA", "CRA", "CRA_retained", "AA", "object_accuracy", "style_accuracy", "shape_accuracy",
    "object_gone", "both_found", "objects_found", "replaced_by", "unsafe_share", "control_seen", "control_unasked",
    "control_object", "control_style", "control_scene", "control_clean",
}  # fmt: skip
"""Metrics that are shares, shown in per cent."""

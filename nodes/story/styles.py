"""Style templates: words put around every panel's prompt, and what each style does not want."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """`template` holds `{prompt}` once; `negative` is what pulls a picture away from the style."""

    template: str
    negative: str


# The subject stands near the front of each template: CLIP gives early tokens the most weight, and the
# character's description must not drown in style words.
STYLES: dict[str, Style] = {
    "none": Style("{prompt}", ""),
    "comic book": Style(
        "comic book panel of {prompt}, bold ink outlines, flat vivid colors, halftone shading",
        "photo, 3d render, blurry, washed out, speech bubble, text",
    ),
    "watercolor": Style(
        "watercolor painting of {prompt}, soft washes on textured paper, gentle edges, light palette",
        "photo, 3d render, hard outlines, neon colors, text",
    ),
    "Japanese animation": Style(
        "Japanese animation still of {prompt}, clean cel shading, expressive faces, painted background",
        "photo, 3d render, western cartoon, muddy colors, text",
    ),
    "photographic": Style(
        "photograph of {prompt}, natural light, 35mm lens, realistic skin and cloth, fine detail",
        "drawing, painting, cartoon, 3d render, plastic skin, oversaturated",
    ),
    "cinematic": Style(
        "film still of {prompt}, dramatic lighting, shallow depth of field, wide shot, color graded",
        "drawing, cartoon, flat lighting, snapshot, watermark, text",
    ),
    "pixel art": Style(
        "pixel art of {prompt}, 16-bit game scene, crisp square pixels, limited palette",
        "photo, blurry, smooth gradients, antialiased, 3d render, text",
    ),
    "line art": Style(
        "line art of {prompt}, black ink on white paper, even confident strokes, no shading",
        "color, photo, 3d render, gray wash, smudges, text",
    ),
    "3D animation": Style(
        "3D animated movie scene of {prompt}, rounded stylized shapes, soft global illumination",
        "photo, flat drawing, sketch, grainy, low poly, text",
    ),
    "oil painting": Style(
        "oil painting of {prompt}, visible brush strokes, rich pigment, canvas texture, warm light",
        "photo, 3d render, flat colors, line drawing, frame, text",
    ),
    "storybook": Style(
        "children's storybook illustration of {prompt}, pencil and gouache, friendly shapes, cozy mood",
        "photo, 3d render, gloomy, gore, harsh contrast, text",
    ),
    "paper cutout": Style(
        "paper cutout scene of {prompt}, layered colored paper, soft cast shadows, handmade look",
        "photo of a person, line drawing, glossy, gradient, text",
    ),
}


def style_named(name: str) -> Style:
    """Look a style up by its name in `STYLES`; ValueError names the styles there are."""
    if name not in STYLES:
        raise ValueError(f"The style {name!r} does not exist. Choose one of: {', '.join(STYLES)}.")
    return STYLES[name]


def apply_style(prompt: str, name: str) -> str:
    """Put `prompt` into the template of the style called `name`."""
    # Not str.format: a prompt may hold braces of its own.
    return style_named(name).template.replace("{prompt}", prompt)


def join_negative(negative: str, name: str) -> str:
    """Join the user's `negative` with that of the style called `name`; either may be empty."""
    parts = (" ".join(negative.split()).rstrip(" ,"), style_named(name).negative)
    return ", ".join(part for part in parts if part)

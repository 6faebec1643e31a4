"""Story text and character sheet to panels: prompts, captions, who stands where."""

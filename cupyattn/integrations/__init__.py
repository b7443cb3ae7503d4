"""cupyattn inside other people's frameworks; each file imports its framework when it is asked to register."""

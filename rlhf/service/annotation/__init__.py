"""Annotation: weeks of pairs, who judges which, the journal, and the batch that comes out."""

"""After a red: the same cases in two environments (``ab``), or in many until one is to blame."""

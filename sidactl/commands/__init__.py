"""One function per command, of the same name: refs in, an Artifact or a score out. The only glue."""

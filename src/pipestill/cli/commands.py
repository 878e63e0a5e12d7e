"""The commands by name, each with what it does."""

COMMANDS = {
    "recipes": "list what ships, with what each needs",
    "train": "train a recipe: teacher, distilled student, and the student alone",
    "profile": "measure what a recipe's blocks and the links between devices take",
    "plan": "search for the fastest strategy, with a table of what was considered",
    "simulate": "time a schedule without running it, and draw it",
    "compare": "measure strategies side by side in one run",
    "check": "prove a schedule, then compare its weights with the plain loop's",
    "trace": "draw what happened in a run",
    "cache": "write what a teacher says of a text to disk, so that students need no teacher",
    "doctor": "what this machine has, what is missing, how to mend it",
}

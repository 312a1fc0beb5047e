"""The processes of a run: how they start, agree, talk on the terminal and leave."""

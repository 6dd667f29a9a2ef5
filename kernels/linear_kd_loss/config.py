"""How many rows of logits are in flight at once."""

MIN_ROWS = 16


def chunk_rows(rows: int, row_bytes: int, workspace_bytes: int) -> int:
    """Rows per chunk, so that a chunk of `row_bytes` a row fits the workspace; equal chunks.

    A chunk repeats the traffic of both heads and of dweight, so it is as large as the budget
    allows. Below `MIN_ROWS` the GEMMs degenerate, and the budget is exceeded instead.
    """
    fitting = max(workspace_bytes // row_bytes, MIN_ROWS)
    if rows <= fitting:
        return max(rows, 1)
    chunks = -(-rows // fitting)
    return -(-rows // chunks)

"""Pictures of schedules and traces: terminal text, SVG and PNG, and Chrome traces for Perfetto."""

from pipestill.draw.boxes import Unit
from pipestill.draw.chrome import chrome_trace, read_chrome_trace, write_chrome_trace
from pipestill.draw.picture import picture
from pipestill.draw.text import schedule_table, text

__all__ = ["Unit", "chrome_trace", "picture", "read_chrome_trace", "schedule_table", "text", "write_chrome_trace"]

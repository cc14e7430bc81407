"""The connection to the browser."""

from types import SimpleNamespace


class PromptServer:
    instance = None

    def __init__(self):
        PromptServer.instance = self
        self.client_id = self.last_node_id = None
        self.routes = SimpleNamespace()

    def send_sync(self, event, data, sid=None):
        """Tests put their recorder here."""

    def send_progress_text(self, text, node_id, sid=None):
        self.send_sync("progress_text", (str(node_id), text), sid)

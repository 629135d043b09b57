// The search runs in a web worker, which browsers refuse to a page that is opened from a folder (file://).  There,
// a hidden frame runs the same script and passes messages as a worker would.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const script = (source) => `<script src="${source}"><\/script>`;
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inner = this.frame.contentWindow;
      window.addEventListener("message", (event) => {
        if (event.source === inner) this.dispatchEvent(new MessageEvent("message", { data: event.data }));
      });
      this.ready = new Promise((resolve) => this.frame.addEventListener("load", resolve, { once: true }));
      // A worker's importScripts loads at once and in order; here each script waits for the one before it.
      inner.document.open();
      inner.document.write(`<!doctype html><script>
        self.postMessage = (data) => parent.postMessage(data, "*");
        self.importScripts = (...urls) => urls.reduce((before, url) => before.then(() => new Promise((done, failed) => {
          const element = document.createElement("script");
          Object.assign(element, { src: url, onload: done, onerror: failed });
          document.head.append(element);
        })), Promise.resolve());
      <\/script>${script(new URL(url, location.href))}`);
      inner.document.close();
    }

    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
    }

    terminate() {
      this.frame.remove();
    }
  };
}

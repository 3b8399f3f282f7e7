// Keys of the labeling page, and the choice between light and dark.
(() => {
  const KEYS = {
    1: "a", a: "a", ArrowLeft: "a", 2: "b", b: "b", ArrowRight: "b",
    3: "tie", t: "tie", 4: "both_bad", x: "both_bad", s: "skip", u: "undo",
  };
  document.addEventListener("keydown", (event) => {
    if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input, textarea, select, [contenteditable]")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const task = document.querySelector("[data-unit]");
    if (!task || document.querySelector(".q-dialog")) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (key === "c") {
      event.preventDefault();
      document.querySelector(".comment input")?.focus();
    } else if (KEYS[key]) {
      event.preventDefault();
      // With the pair that is seen: an answer that comes late must not be taken for the next pair's.
      emitEvent("label_key", { choice: KEYS[key], unit: task.dataset.unit });
    } else if (key === "?") {
      document.querySelector(".help-button")?.click();
    }
  });

  // A new pair begins at its top, and a long conversation at its last turn.
  window.labelShown = () => {
    window.scrollTo(0, 0);
    const prompt = document.querySelector(".prompt .pane-body");
    if (prompt?.querySelector(".turn")) prompt.scrollTop = prompt.scrollHeight;
  };

  const kept = () => {
    try { return localStorage.getItem("rlhf_dist_label_dark"); } catch { return null; }
  };
  window.toggleLabelDark = () => {
    const dark = !document.body.classList.contains("body--dark");
    Quasar.Dark.set(dark);
    try { localStorage.setItem("rlhf_dist_label_dark", String(dark)); } catch { /* private windows may forbid it */ }
  };
  window.addEventListener("load", () => {
    if (kept() !== null) Quasar.Dark.set(kept() === "true");
  });
})();

"use strict";
// Drafts, shortcuts and submission of one pair. What is typed is kept here at once and on the
// server soon after; a submission is repeated until it is answered, which changes nothing twice.
(() => {
  const form = document.getElementById("verdict");
  const { key, next } = form.dataset;
  const NAME = `rlhf-draft-${key}`;
  const DONE = `rlhf-done-${key}`;
  const SHORTCUTS = "rlhf-shortcuts";
  const PAUSE = 500;
  const LONGEST = 20000;
  const kept = document.getElementById("kept");
  const refusal = document.getElementById("refusal");
  const path = `/api/v1/assignments/${encodeURIComponent(key)}`;
  const TRUTH = { true: true, false: false };

  const store = {
    get: (name) => { try { return localStorage.getItem(name); } catch { return null; } },
    set: (name, value) => { try { localStorage.setItem(name, value); } catch { /* full or forbidden */ } },
    drop: (name) => { try { localStorage.removeItem(name); } catch { /* forbidden */ } },
  };

  // Time in view, without what was spent elsewhere.
  let seen = 0;
  let since = document.hidden ? null : performance.now();
  const seconds = () => (seen + (since === null ? 0 : performance.now() - since)) / 1000;

  const checked = (name) => form.querySelector(`input[name=${name}]:checked`)?.value ?? null;
  const read = () => {
    const choice = checked("choice");
    const cut = choice === null ? -1 : choice.indexOf("-");
    return {
      preferred: choice === null ? null : choice.slice(0, cut),
      strength: choice === null ? null : choice.slice(cut + 1),
      safe_left: TRUTH[checked("safe_left")] ?? null,
      safe_right: TRUTH[checked("safe_right")] ?? null,
      comment: form.elements.comment.value,
      reason: form.elements.reason.value,
    };
  };
  const write = (draft) => {
    const mark = (name, value) => {
      for (const input of form.querySelectorAll(`input[name=${name}]`)) input.checked = input.value === value;
    };
    mark("choice", draft.preferred === null ? null : `${draft.preferred}-${draft.strength}`);
    mark("safe_left", String(draft.safe_left));
    mark("safe_right", String(draft.safe_right));
    for (const name of ["comment", "reason"]) {
      if (form.elements[name].value !== draft[name]) form.elements[name].value = draft[name];
    }
    if (draft.reason) document.getElementById("skipping").open = true;
  };

  // Drafts
  let draft = JSON.parse(form.dataset.draft);
  let saved = draft.saved;
  let timer = null;
  let isSent = false;
  const put = async (options = {}) => {
    clearTimeout(timer);
    timer = null;
    if (isSent || saved === draft.saved) return;
    const sending = draft;
    try {
      const answer = await rlhf.api(`${path}/draft`, { method: "PUT", body: sending, ...options });
      saved = Math.max(saved, sending.saved);
      if (answer.draft.saved > draft.saved) adopt(answer.draft);
      if (draft === sending && !isSent) kept.textContent = "Draft kept on the server.";
    } catch (error) {
      if (isSent) return;
      if (error.status === 409) {
        refuse(error.message, { isOver: true });
        return;
      }
      kept.textContent = "Draft kept in this browser only; the server does not take it now.";
      timer = setTimeout(put, 5000);
    }
  };
  const adopt = (other) => {
    draft = other;
    saved = Math.max(saved, other.saved);
    write(other);
  };
  const typed = () => {
    draft = { ...read(), saved: Math.max(Date.now(), draft.saved + 1) };
    store.set(NAME, JSON.stringify(draft));
    refusal.hidden = true;
    clearTimeout(timer);
    timer = setTimeout(put, PAUSE);
  };
  const local = JSON.parse(store.get(NAME) ?? "null");
  if (local !== null && local.saved > draft.saved) {
    draft = local;
    write(draft);
    put();
  } else {
    write(draft);
  }
  form.addEventListener("input", typed);
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) {
      seen += since === null ? 0 : performance.now() - since;
      since = null;
      put({ keepalive: true });
    } else {
      since = performance.now();
    }
  });
  window.addEventListener("pagehide", () => put({ keepalive: true }));
  window.addEventListener("storage", (event) => {
    if (event.key === DONE && event.newValue !== null && !isSent) {
      isSent = true;
      rlhf.announce("This pair was finished in another tab.");
      location.replace(next);
    }
    if (event.key === NAME && event.newValue !== null) {
      const other = JSON.parse(event.newValue);
      if (other.saved > draft.saved) adopt(other);
    }
  });

  // Submission
  let isBusy = false;
  const free = () => {
    isBusy = false;
    delete form.dataset.sent;
    for (const button of form.querySelectorAll("[aria-disabled]")) button.removeAttribute("aria-disabled");
  };
  const refuse = (text, { isOver = false } = {}) => {
    refusal.textContent = text;
    if (isOver) {
      const link = document.createElement("a");
      link.href = next;
      link.textContent = "Next pair";
      refusal.append(" ", link);
    }
    refusal.hidden = false;
  };
  const finish = () => {
    isSent = true;
    clearTimeout(timer);
    store.set(DONE, "yes");
    store.drop(DONE);
    store.drop(NAME);
    location.replace(next);
  };
  const send = async (what, body, wait = 1000) => {
    kept.textContent = "Sending ...";
    try {
      await rlhf.api(`${path}/${what}`, { method: "POST", body });
      finish();
    } catch (error) {
      kept.textContent = "";
      if (error.status === undefined || error.status >= 500) {
        kept.textContent = "The server does not answer. What you did is kept, and is sent again in a moment.";
        setTimeout(() => send(what, body, Math.min(LONGEST, wait * 2)), wait);
        return;
      }
      free();
      const again = error.status === 401 ? " Sign in again in another tab; what you did is kept here." : "";
      refuse(error.message + again, { isOver: error.status === 409 || error.status === 404 });
      if (error.status === 409) store.drop(NAME);
    }
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (isBusy || isSent) return;
    isBusy = true;
    refusal.hidden = true;
    const { preferred, strength, safe_left, safe_right, comment, reason } = read();
    if (event.submitter?.value === "skip") {
      if (reason.trim() === "") {
        free();
        refuse("A skip needs a reason: choose one, or write your own.");
        form.elements.reason.focus();
        return;
      }
      send("skip", { reason });
      return;
    }
    send("submit", { preferred, strength, safe_left, safe_right, comment, seconds: Math.round(seconds() * 10) / 10 });
  });

  // A guideline that was folded stays so, for its axis.
  const guideline = document.getElementById("guideline");
  const FOLDED = `rlhf-folded-${guideline.dataset.axis}`;
  if (store.get(FOLDED) === "yes") guideline.open = false;
  guideline.addEventListener("toggle", () => store.set(FOLDED, guideline.open ? "no" : "yes"));

  // Shortcuts
  const toggle = document.getElementById("shortcuts");
  toggle.checked = store.get(SHORTCUTS) !== "off";
  toggle.addEventListener("change", () => store.set(SHORTCUTS, toggle.checked ? "on" : "off"));
  const primary = form.querySelector("button[value=submit]");
  const skipping = document.getElementById("skipping");
  const isText = (element) => element.matches("textarea, select, input:not([type=radio], [type=checkbox])");
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      form.requestSubmit(primary);
      return;
    }
    if (event.key === "Enter" && event.target === form.elements.reason) {
      event.preventDefault();
      form.requestSubmit(form.querySelector("button[value=skip]"));
      return;
    }
    if (event.key === "Escape" && isText(event.target)) event.target.blur();
    if (!toggle.checked || event.ctrlKey || event.metaKey || event.altKey || isText(event.target)) return;
    const pressed = event.key.toLowerCase();
    const input = /^[a-z0-9]$/.test(pressed) ? form.querySelector(`input[data-key="${pressed}"]`) : null;
    if (input !== null) {
      input.checked = true;
      input.focus({ preventScroll: true });
      rlhf.announce(input.closest("label").textContent.replace(/\s+/g, " ").trim());
      typed();
    } else if (pressed === "c") {
      form.elements.comment.focus();
    } else if (pressed === "s") {
      skipping.open = true;
      form.elements.reason.focus();
    } else {
      return;
    }
    event.preventDefault();
  });
})();

"use strict";
// Drafts, shortcuts and submission of one pair. What is typed is kept here at once and on the
// server soon after; a submission is repeated until it is answered, which changes nothing twice,
// and the form is frozen until then: a change of it would be lost.
(() => {
  const form = document.getElementById("verdict");
  const { key, next } = form.dataset;
  const NAME = `rlhf-draft-${key}`;
  const DONE = `rlhf-done-${key}`;
  const SHORTCUTS = "rlhf-shortcuts";
  const PAUSE = 500;
  const LONGEST = 20000;
  const TRIES = 3;
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
  let isBusy = false;
  let isHeld = false;
  // Drafts of this browser, and those that it was shown.
  const known = new Set([saved]);
  const put = async (options = {}) => {
    clearTimeout(timer);
    timer = null;
    if (isSent || isHeld || saved === draft.saved) return;
    const sending = draft;
    known.add(sending.saved);
    try {
      const body = { ...sending, based_on: saved };
      const answer = await rlhf.api(`${path}/draft`, { method: "PUT", body, ...options });
      const there = answer.draft.saved;
      saved = Math.max(saved, there);
      if (isSent || isBusy) return;
      if (!known.has(there)) {
        offer(answer.draft);
      } else if (there < draft.saved) {
        timer ??= setTimeout(put, PAUSE);
      } else {
        kept.textContent = answer.state === "expired"
          ? "Draft kept on the server. This pair was left alone for so long that somebody else has it now."
          : "Draft kept on the server.";
      }
    } catch (error) {
      if (isSent || isBusy) return;
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
    known.add(other.saved);
    write(other);
  };
  const adoptNewer = (text) => {
    const other = JSON.parse(text ?? "null");
    if (other !== null && other.saved > draft.saved) adopt(other);
  };
  // Another browser's draft is neither replaced nor taken without a word.
  const offer = (other) => {
    isHeld = true;
    refuse("Another browser of yours has kept something else for this pair. Type on to replace it.");
    const button = document.createElement("button");
    button.type = "button";
    button.className = "button";
    button.textContent = "Take what it kept";
    button.addEventListener("click", () => {
      isHeld = false;
      adopt(other);
      store.set(NAME, JSON.stringify(other));
      refusal.hidden = true;
    });
    refusal.append(" ", button);
  };
  const typed = () => {
    draft = { ...read(), saved: Math.max(Date.now(), draft.saved + 1, saved + 1) };
    isHeld = false;
    store.set(NAME, JSON.stringify(draft));
    refusal.hidden = true;
    clearTimeout(timer);
    timer = setTimeout(put, PAUSE);
  };
  const local = JSON.parse(store.get(NAME) ?? "null");
  if (local !== null && local.saved > draft.saved) {
    draft = local;
    known.add(draft.saved);
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
      location.replace(next);
    }
    if (event.key === NAME && !isBusy) adoptNewer(event.newValue);
  });

  // Submission
  const freeze = (isFrozen) => {
    isBusy = isFrozen;
    for (const input of form.querySelectorAll("input[type=radio]")) input.disabled = isFrozen;
    for (const name of ["comment", "reason"]) form.elements[name].readOnly = isFrozen;
  };
  // Browsers may restore a frozen form with the page.
  freeze(false);
  let focused = null;
  const free = () => {
    freeze(false);
    delete form.dataset.sent;
    for (const button of form.querySelectorAll("[aria-disabled]")) button.removeAttribute("aria-disabled");
    if (document.activeElement === document.body) focused?.focus({ preventScroll: true });
    adoptNewer(store.get(NAME));
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
  const send = async (what, body, tries = 1) => {
    kept.textContent = "Sending ...";
    try {
      await rlhf.api(`${path}/${what}`, { method: "POST", body });
      finish();
    } catch (error) {
      kept.textContent = "";
      const isAway = error.status === undefined || error.status >= 500;
      if (isAway && (error.status !== 500 || tries < TRIES)) {
        const said = error.status === undefined ? "The server does not answer" : error.message;
        kept.textContent = `${said}. What you did is kept and is sent again in a moment; it cannot be changed until then.`;
        setTimeout(() => send(what, body, tries + 1), Math.min(LONGEST, 500 * 2 ** tries));
        return;
      }
      free();
      const isOver = error.status === 409 || error.status === 404;
      const again = error.status === 401 ? " Sign in again in another tab; what you did is kept here." : "";
      refuse(error.message + again, { isOver });
      if (error.status === 409) store.drop(NAME);
      if (!isOver) timer = setTimeout(put, PAUSE);
    }
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (isBusy || isSent) return;
    focused = document.activeElement;
    freeze(true);
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
    // Enter may end a word of an input method.
    if (event.isComposing) return;
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
    if (isBusy || !toggle.checked || event.ctrlKey || event.metaKey || event.altKey || isText(event.target)) return;
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

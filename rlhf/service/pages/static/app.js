"use strict";
// What every page shares: live parts, forms that are sent once, times in the reader's zone.
const rlhf = (() => {
  const all = (root, selector) => Array.from(root.querySelectorAll(selector));
  document.documentElement.classList.add("scripted-on");

  const announce = (text) => {
    const place = document.getElementById("announcer");
    if (place.textContent !== text) place.textContent = text;
  };
  const trouble = (text) => {
    const place = document.getElementById("trouble");
    place.textContent = text;
    place.hidden = text === "";
  };

  // Requests to the API: JSON in, JSON out; an error carries the problem document's sentence.
  const api = async (path, { method = "GET", body, headers = {}, ...rest } = {}) => {
    const sent = { Accept: "application/json", ...headers };
    const csrf = document.querySelector("meta[name=csrf]")?.content;
    if (csrf) sent["X-CSRF-Token"] = csrf;
    if (body !== undefined) sent["Content-Type"] = "application/json";
    const answer = await fetch(path, {
      method, headers: sent, body: body === undefined ? undefined : JSON.stringify(body), ...rest,
    });
    const isJson = (answer.headers.get("Content-Type") ?? "").includes("json");
    const content = isJson ? await answer.json() : null;
    if (!answer.ok) {
      const error = new Error(content?.detail ?? `the service answered ${answer.status}`);
      error.status = answer.status;
      throw error;
    }
    return content;
  };

  const showTimes = (root) => {
    for (const time of all(root, "time[datetime]")) {
      const moment = new Date(time.dateTime);
      if (Number.isNaN(moment.getTime())) continue;
      time.title = time.textContent;
      time.textContent = moment.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
    }
  };

  // Live parts: an element with data-live is filled again from that address while it is visible.
  const LONGEST = 60;
  // As the browser writes it, so that what came with the page can be compared with what comes later.
  const normal = (text) => {
    const holder = document.createElement("template");
    holder.innerHTML = text;
    return holder.innerHTML.trim();
  };
  const holdsSelection = (part) => {
    const selection = getSelection();
    return !selection.isCollapsed && selection.containsNode(part, true);
  };
  const ENDS = {
    401: "You have been signed out: load the page again.",
    404: "What this page shows is gone: load the page again.",
  };
  const watch = (part, first) => {
    const every = Number(part.dataset.every ?? 5);
    let wait = every;
    let last = first;
    let stopped = false;
    const refresh = async () => {
      wait = Math.min(LONGEST, wait * 2);
      let answer;
      let text;
      try {
        answer = await fetch(part.dataset.live, { headers: { Accept: "text/html", "X-Live": "1" } });
        text = normal(await answer.text());
      } catch {
        trouble("The service does not answer; trying again.");
        return;
      }
      const end = ENDS[answer.redirected ? 401 : answer.status];
      if (end || !answer.ok) {
        trouble(end ?? `The service cannot say how things stand (status ${answer.status}); trying again.`);
        stopped = end !== undefined;
        return;
      }
      // What somebody is marking to copy stays until they are done.
      if (text !== last && !holdsSelection(part)) {
        replace(part, text);
        last = text;
      }
      // What is done seldom changes.
      wait = part.querySelector("[data-state=done]") ? LONGEST : every;
      trouble("");
    };
    const loop = async () => {
      if (!document.hidden) await refresh();
      if (!stopped) setTimeout(loop, wait * 1000);
    };
    setTimeout(loop, every * 1000);
  };
  // Elements that a focus may have been on before the part was filled again: same tag, same target.
  const FOCUSABLE = "a[href], button, input, select, summary, textarea, [tabindex]";
  const kinOf = (part, element) => all(part, FOCUSABLE).filter((other) =>
    other.tagName === element.tagName && other.id === element.id &&
    other.getAttribute("href") === element.getAttribute("href") &&
    other.dataset.keep === element.dataset.keep);
  const replace = (part, text) => {
    const focused = part.contains(document.activeElement) ? document.activeElement : null;
    const place = focused ? kinOf(part, focused).indexOf(focused) : -1;
    const open = new Set(all(part, "details[open][id]").map((item) => item.id));
    const isAtEnd = (e) => e.scrollTop + e.clientHeight >= e.scrollHeight - 4;
    const scrolled = new Map(all(part, "[data-keep]").map(
      (e) => [e.dataset.keep, [e.scrollLeft, isAtEnd(e) && e.matches("pre") ? Infinity : e.scrollTop]],
    ));
    part.innerHTML = text;
    for (const item of all(part, "details[id]")) if (open.has(item.id)) item.open = true;
    for (const item of all(part, "[data-keep]")) {
      const [left, top] = scrolled.get(item.dataset.keep) ?? [0, 0];
      item.scrollLeft = left;
      item.scrollTop = Math.min(top, item.scrollHeight);
    }
    prepare(part);
    if (focused) (kinOf(part, focused)[place] ?? kinOf(part, focused)[0])?.focus({ preventScroll: true });
  };

  // A second click on a form's button sends nothing; going back makes it usable again.
  const sendOnce = (root) => {
    for (const form of all(root, "form[method=post]")) {
      form.addEventListener("submit", (event) => {
        if (form.dataset.sent) event.preventDefault();
        form.dataset.sent = "yes";
        for (const button of all(form, "button[type=submit]")) button.setAttribute("aria-disabled", "true");
      });
    }
  };
  window.addEventListener("pageshow", () => {
    for (const form of all(document, "form[data-sent]")) {
      delete form.dataset.sent;
      for (const button of all(form, "[aria-disabled]")) button.removeAttribute("aria-disabled");
    }
  });

  const prepare = (root) => {
    showTimes(root);
    sendOnce(root);
  };
  const parts = all(document, "[data-live]").map((part) => [part, normal(part.innerHTML)]);
  prepare(document);
  // A log is read from its end.
  for (const log of all(document, "pre[data-keep]")) log.scrollTop = log.scrollHeight;
  for (const [part, first] of parts) watch(part, first);
  return { announce, trouble, api };
})();

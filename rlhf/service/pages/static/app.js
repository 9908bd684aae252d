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
      error.problem = content;
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
  const watch = (part) => {
    const every = Number(part.dataset.every ?? 5);
    let wait = every;
    let last = null;
    let stopped = false;
    const refresh = async () => {
      try {
        const answer = await fetch(part.dataset.live, { headers: { Accept: "text/html", "X-Live": "1" } });
        if (answer.status === 401 || answer.redirected) {
          trouble("You have been signed out: load the page again.");
          stopped = true;
          return;
        }
        if (!answer.ok) throw new Error(String(answer.status));
        const text = await answer.text();
        if (text !== last) replace(part, text);
        last = text;
        wait = every;
        trouble("");
      } catch {
        wait = Math.min(LONGEST, wait * 2);
        trouble("The service does not answer; trying again.");
      }
    };
    const loop = async () => {
      if (!document.hidden) await refresh();
      if (!stopped) setTimeout(loop, wait * 1000);
    };
    setTimeout(loop, every * 1000);
  };
  const replace = (part, text) => {
    const focused = part.contains(document.activeElement) ? document.activeElement : null;
    const target = focused?.getAttribute("href") ?? focused?.id;
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
    if (target) {
      all(part, "[href], [id]").find((e) => e.getAttribute("href") === target || e.id === target)?.focus();
    }
    prepare(part);
    part.dispatchEvent(new CustomEvent("renewed", { bubbles: true }));
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
  prepare(document);
  // A log is read from its end.
  for (const log of all(document, "pre[data-keep]")) log.scrollTop = log.scrollHeight;
  for (const part of all(document, "[data-live]")) watch(part);
  return { all, announce, trouble, api };
})();

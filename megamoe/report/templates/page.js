"use strict";
// The page reads without this; it adds copying, filtering and keys.
(() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const show = (selector) => all(selector).forEach((element) => { element.hidden = false; });
  const folds = all(".failure details");
  const failures = all(".failure");

  show(".copy");
  document.addEventListener("click", (event) => {
    if (!event.target.matches(".copy")) return;
    const button = event.target;
    const code = button.parentElement.querySelector("code");
    const label = (word) => {
      button.textContent = word;
      setTimeout(() => { button.textContent = "copy"; }, 1500);
    };
    const select = () => {
      getSelection().selectAllChildren(code);
      label("selected");
    };
    if (!navigator.clipboard) return select();
    navigator.clipboard.writeText(code.textContent).then(() => label("copied"), select);
  });

  // A link to a folded failure unfolds it.
  const reach = (article) => {
    const fold = article.querySelector("details");
    if (fold) fold.open = true;
    article.scrollIntoView({ block: "start" });
    article.focus({ preventScroll: true });
  };
  const follow = () => {
    const target = document.getElementById(location.hash.slice(1));
    if (target && target.matches(".failure")) reach(target);
  };
  addEventListener("hashchange", follow);
  follow();

  const filter = document.getElementById("filter");
  if (filter) {
    show(".filter");
    const rows = all(".cases tbody tr");
    filter.addEventListener("input", () => {
      const pattern = filter.value.trim().toLowerCase();
      let matches = 0;
      for (const row of rows) {
        row.hidden = !row.textContent.toLowerCase().includes(pattern);
        matches += row.hidden ? 0 : 1;
      }
      document.getElementById("found").textContent = pattern ? `${matches} of ${rows.length}` : "";
    });
    show(".keys");
  }

  let at = -1;
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches("input")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if ((event.key === "j" || event.key === "k") && failures.length) {
      const here = failures.indexOf(document.activeElement.closest(".failure"));
      const from = here < 0 ? at : here;
      at = event.key === "j" ? Math.min(from + 1, failures.length - 1) : Math.max(from - 1, 0);
      reach(failures[at]);
    } else if (event.key === "e" && folds.length) {
      const open = folds.some((fold) => !fold.open);
      folds.forEach((fold) => { fold.open = open; });
    } else if (event.key === "/" && filter) {
      event.preventDefault();
      filter.focus();
    }
  });

  // On paper nothing can be unfolded.
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = folds.filter((fold) => !fold.open && !fold.closest(".later"));
    closed.forEach((fold) => { fold.open = true; });
  });
  addEventListener("afterprint", () => closed.forEach((fold) => { fold.open = false; }));
})();

// A login box for every element with data-wxscan, which lists the ways to log in,
// such as "scan,auth,code": the first is shown, the next where that fails or on demand.
// When somebody has logged in, the element gets a "wxscan:login" event whose
// detail is the answer of /wechat/checklogin, with openid and token.
// Other sites can include this script once their origin is in ALLOWED_ORIGINS.
"use strict";
(() => {
  const base = new URL(document.currentScript.src).origin;
  const isOurs = document.body?.classList.contains("wxscan-page"); // a page of wxscan's own
  const inWeChat = /MicroMessenger/i.test(navigator.userAgent);
  const onPhone = !inWeChat && /Mobi/i.test(navigator.userAgent) && !/iPad/.test(navigator.userAgent);

  const languages = { "zh-CN": "简体", "zh-TW": "繁體", en: "English" };
  const language = (isOurs && /wxscan_language=(zh-CN|zh-TW|en)/.exec(document.cookie)?.[1]) ||
    (!/^zh\b/i.test(navigator.language) ? "en" : /TW|HK|MO|Hant/i.test(navigator.language) ? "zh-TW" : "zh-CN");
  const say = (...texts) => texts[Object.keys(languages).indexOf(language)];
  const words = {
    wechat_unreachable: say("暂时连不上微信，请稍后再试", "暫時無法連線到微信，請稍後再試", "WeChat cannot be reached just now."),
    wechat_refused: say("微信拒绝了请求，请联系网站管理员", "微信拒絕了要求，請聯絡網站管理員", "WeChat refused. Please tell the site’s owner."),
    too_many_tickets: say("登录的人太多，请稍后再试", "登入的人太多，請稍後再試", "Too many people just now. Try again in a moment."),
    rate_limited: say("操作太频繁，请稍后再试", "操作太頻繁，請稍後再試", "Too many requests. Try again in a moment."),
    lost: say("网络连接中断，正在重试…", "網路連線中斷，正在重試…", "The connection is lost. Trying again…"),
    store_unavailable: say("服务暂时不可用，正在重试…", "服務暫時無法使用，正在重試…", "Logins are down just now. Trying again…"),
    error: say("出错了，请重试", "發生錯誤，請重試", "Something went wrong. Please try again."),
    loading: say("正在获取登录码…", "正在取得登入碼…", "Getting a code…"), left: say("有效期剩余 ", "有效時間剩餘 ", "Valid for "),
    picture: say("登录二维码，请用微信扫描", "登入 QR 碼，請用微信掃描", "Login QR code, to be scanned with WeChat"),
    scan: say("请用微信扫一扫", "請用微信掃一掃", "Scan with WeChat"), hold: say("请长按识别二维码", "請長按辨識 QR 碼", "Press and hold"),
    album: say("长按保存图片，\n在微信里扫一扫从相册选取", "長按儲存圖片，\n在微信裡掃一掃從相簿選取", "Save the picture, and scan it in WeChat"),
    orLink: say("或复制链接，在微信聊天中打开", "或複製連結，在微信聊天中開啟", "Or open the link in a WeChat chat"),
    follow: say("首次登录需关注公众号", "首次登入需關注公眾號", "The first time, follow the account"),
    send: say("关注公众号，把这六位数字发送给它", "關注公眾號，把這六位數字傳送給它", "Follow us, and send these digits"),
    account: say("公众号二维码", "公眾號 QR 碼", "QR code of the account"), copy: say("复制", "複製", "Copy"),
    received: say("已收到，请在手机上选择这个数字", "已收到，請在手機上選擇這個數字", "Received. Choose this number on your phone"),
    agree: say("扫码后请按手机提示操作", "掃碼後請依手機提示操作", "Then look at your phone"),
    instead: say("刚才的方式暂不可用，已自动换一种", "剛才的方式暫時無法使用，已自動換一種", "The other way is down just now"),
    scanned: say("已扫描，请在手机上选择这个数字", "已掃描，請在手機上選擇這個數字", "Scanned. Choose this number on your phone"),
    expired: say("登录码已过期", "登入碼已過期", "The code has expired"), done: say("您已登录", "您已登入", "You are logged in"),
    declined: say("已在手机上拒绝", "已在手機上拒絕", "Declined on the phone"), copied: say("已复制", "已複製", "Copied"),
    unfinished: say("登录未完成", "登入未完成", "You are not logged in"), retry: say("重试", "重試", "Try again"),
    refresh: say("刷新登录码", "重新整理登入碼", "New code"), another: say("换一种方式", "換一種方式", "Another way"),
    save: say("保存图片", "儲存圖片", "Save picture"), phone: say("模拟手机", "模擬手機", "Simulated phone"),
    copyLink: say("复制链接", "複製連結", "Copy link"), logOut: say("退出登录", "登出", "Log out"), goOn: say("继续", "繼續", "Continue"),
  };

  // first resolves at the first of some events, each [target, name], or after ms
  // if that is given. It leaves no listener behind.
  const first = (events, ms) => new Promise((resolve) => {
    const each = (what) => events.forEach(([target, name]) => target[what](name, end));
    const end = () => { clearTimeout(timer); each("removeEventListener"); resolve(); };
    const timer = ms && setTimeout(end, ms);
    each("addEventListener");
  });
  const turned = [document, "visibilitychange"];
  // sleep also ends when there may be no need to wait any longer.
  const sleep = (ms, signal) => first([[signal, "abort"], [window, "online"], turned], ms);
  // shown resolves when somebody can see the page.
  const shown = async (signal) => {
    while (document.hidden && !signal.aborted) await first([[signal, "abort"], turned]);
  };

  // ask returns the JSON of an answer, or throws its error code: "lost" if there is none, "hidden" once nobody sees the
  // page: that is not worth a connection, for over HTTP/1.1 a browser has six for a site, and a poll keeps one.
  async function ask(path, signal, whileShown = false) {
    const stop = new AbortController();
    const ends = [[signal, "abort"], [stop.signal, "abort"], ...(whileShown ? [turned] : [])];
    first(ends, 40e3).then(() => stop.abort()); // that is above the server's longest wait
    try {
      const response = await fetch(base + path, { signal: stop.signal, cache: "no-store", credentials: "include" });
      const answer = await response.json();
      if (!response.ok) throw Object.assign(new Error(), { code: answer.error });
      return answer;
    } catch (err) {
      const code = whileShown && document.hidden ? "hidden" : "lost";
      throw typeof err.code === "string" ? err : Object.assign(new Error(), { code });
    } finally {
      stop.abort();
    }
  }
  const poll = (ticket, signal, more = "", whileShown = false) =>
    ask("/wechat/checklogin?ticket=" + encodeURIComponent(ticket) + more, signal, whileShown);

  const make = (tag, className, props) => Object.assign(document.createElement(tag), { className, ...props });
  const button = (className, innerText, onclick) => make("button", className, { type: "button", innerText, onclick });
  const drawn = (path) => `<svg viewBox="0 0 24 24" aria-hidden="true"><path d="${path}"/></svg>`;
  const icon = (className, path) => make("span", className, { innerHTML: drawn(path) });
  const good = () => icon("wxscan-mark wxscan-good", "M5.5 12.5l4.5 4.5 9-9.5");
  // Over plain http, browsers have no clipboard.
  const copy = async (text) => (navigator.clipboard ? navigator.clipboard.writeText(text) : prompt("", text));
  // picture is a QR code: one that a phone can save, or one that is sharp at any size.
  const picture = (qr) => make("img", "", {
    alt: words.picture,
    src: `${base}/wechat/qr.${onPhone || inWeChat ? "png" : "svg"}?ticket=${encodeURIComponent(qr.ticket)}`,
  });
  // digits are to be read and typed, below the account's own QR code, if that is known. They do without its picture.
  const digits = ({ code, qrUrl }) => {
    const all = make("div", "wxscan-digits", { innerHTML: code.replace(/^(...)(...)$/, "<p>$1<span>$2</span></p>") });
    const account = { alt: words.account, referrerPolicy: "no-referrer", onerror() { this.remove(); } };
    if (qrUrl) all.prepend(make("img", "", { ...account, src: qrUrl }));
    return all;
  };
  // The ways to log in: where a code comes from, how it is shown, what to know about it.
  const ways = {
    scan: { begin: "/wechat/getloginqr", show: picture, hint: words.follow },
    auth: { begin: "/wechat/getauthqr", show: picture, hint: words.agree },
    code: { begin: "/wechat/getlogincode", show: digits, hint: "", seen: words.received },
  };

  // A Box is what one element shows: a face, words below it, and what can be pressed.
  // What is news is read aloud, but not every second of the time.
  class Box {
    constructor(element) {
      element.classList.add("wxscan");
      element.classList.toggle("wxscan-handheld", onPhone);
      element.innerHTML = `<div></div><div class="wxscan-words"><div role="status"><p class="wxscan-status"></p>
        <p class="wxscan-hint"></p></div><p class="wxscan-time" role="timer"></p></div><div class="wxscan-more"></div>`;
      this.face = element.firstChild;
      this.control = new AbortController(); // ends the login that the box shows
      for (const part of ["status", "hint", "time", "more"]) this[part] = element.querySelector(".wxscan-" + part);
    }
    say(status, hint = "") {
      if (this.status.textContent !== status) this.status.textContent = status;
      if (this.hint.textContent !== hint) this.hint.textContent = hint;
    }
    // look changes all but the words. What had the focus hands it on.
    look(kind, nodes, offers) {
      this.held ||= [this.face, this.more].some((part) => part.contains(document.activeElement));
      this.face.className = "wxscan-code " + kind;
      this.face.replaceChildren(...nodes.filter(Boolean));
      this.more.replaceChildren(...offers.filter(Boolean));
      this.time.textContent = "";
      const next = this.held && (this.face.querySelector("button") || this.more.querySelector("button, a"));
      if (next) next.focus();
      this.held &&= !next;
    }
    // show shows a new code; it rejects if the picture does not come.
    async show(qr, way, note, another, signal) {
      const code = way.show(qr);
      if (code.decode) await code.decode();
      if (signal.aborted) return;
      const give = (text, hint) => () => copy(text).then(() => this.say(words.copied, hint));
      const link = onPhone && way === ways.auth && button("wxscan-main", words.copyLink, give(qr.url, words.orLink));
      const send = qr.code && button("wxscan-main", words.copy, give(qr.code, words.send));
      const saved = { href: code.src, download: "", innerText: words.save };
      const save = onPhone && !send && make("a", "wxscan-button", saved);
      const phone = qr.url || qr.qrUrl?.replace("/qr/code", "/chat");
      const isDemo = phone && new URL(phone).pathname.startsWith("/demo/");
      this.look("", [code], [link || send, save, isDemo && simulate(phone), another]);
      if (send) this.say(words.send, note || way.hint);
      else if (onPhone) this.say(words.album, note || (link ? words.orLink : ""));
      else this.say(inWeChat ? words.hold : words.scan, note || way.hint);
    }
    tick(deadline) {
      const left = Math.max(0, Math.ceil((deadline - Date.now()) / 1000));
      this.time.textContent = words.left + Math.floor(left / 60) + ":" + String(left % 60).padStart(2, "0");
    }
    // stop says what ended a login, and resolves when the button is pressed.
    stop(signal, another, text, label, isOld = false) {
      const again = button(isOld ? "wxscan-again" : "wxscan-main", label);
      if (isOld) this.look("old", [this.face.querySelector("img, .wxscan-digits"), again], [another]);
      else this.look("wxscan-result", [icon("wxscan-mark wxscan-bad", "M12 5v9M12 18.5v.01")], [again, another]);
      this.say(text);
      return first([[again, "click"], [signal, "abort"]]);
    }
    // who shows somebody who is logged in.
    who({ openid, nickname, avatar }, offers) {
      const short = openid.length > 16 ? openid.slice(0, 6) + "…" + openid.slice(-4) : openid;
      const id = button("wxscan-openid", short, () => copy(openid).then(() => this.say(words.copied)));
      id.title = openid;
      id.append(icon("", "M9 9h11v11H9zM5 15H4V4h11v1"));
      const face = avatar && make("img", "wxscan-avatar", { alt: "", src: avatar, referrerPolicy: "no-referrer" });
      const name = nickname && make("p", "wxscan-name", { textContent: nickname });
      this.look("wxscan-result", [face || good(), name, id], offers);
      this.say(words.done);
    }
  }

  // simulate shows the demo's phone: beside our login card where there is room for
  // it, else behind a link. It returns the link if that is to stand in the box.
  function simulate(url) {
    const link = make("a", "wxscan-button wxscan-demo", { href: url, target: "_blank", textContent: words.phone });
    if (!isOurs || new URL(url).origin !== location.origin) return link;
    const frame = frames[0];
    if (frame) frame.location.replace(url);
    else document.body.append(make("iframe", "wxscan-phone", { src: url, title: words.phone }));
    document.querySelector("body > .wxscan-demo")?.remove();
    document.querySelector("main").after(link);
  }

  // scan gets a code, shows it, and polls until the login has ended, only while somebody can see the page and at once
  // when it is seen again; it returns the answer. It bears a lost connection, with ever longer pauses.
  async function scan(box, way, note, another, again, signal) {
    const qr = await ask(way.begin, signal);
    await box.show(qr, way, note, another, signal);
    let deadline = Date.now() + qr.expiresIn * 1000;
    const ticking = setInterval(() => box.tick(deadline), 1000);
    let prompt = [box.status.textContent, box.hint.textContent];
    try {
      for (let seen = "pending", pause = 1000, wait = 25; ;) {
        await shown(signal);
        if (signal.aborted) return {};
        box.tick(deadline);
        const asked = Date.now();
        try {
          const answer = await poll(qr.ticket, signal, `&wait=${wait}&status=${seen}`, true);
          if (signal.aborted || (answer.status !== "pending" && answer.status !== "scanned")) return answer;
          deadline = Date.now() + answer.expiresIn * 1000;
          [pause, wait] = [1000, 25];
          if (answer.status !== seen) {
            seen = answer.status;
            const number = make("p", "wxscan-number", { textContent: answer.number });
            box.look("wxscan-result", [good(), number], [button("wxscan-button", words.refresh, again)]);
            prompt = [way.seen || words.scanned];
          } else if (Date.now() - asked < 1000) {
            await sleep(1000, signal); // the server is going down
          }
          box.say(...prompt);
        } catch (err) {
          if (signal.aborted) return {};
          if (err.code === "hidden") continue;
          if (Date.now() > deadline) return { status: "expired" };
          box.say(words[err.code] || words.error);
          wait = 0; // to learn at once that the connection is back
          await sleep(pause, signal);
          pause = Math.min(2 * pause, 15e3);
        }
      }
    } finally {
      clearInterval(ticking);
    }
  }

  // leave goes to the authorize page at once: inside WeChat nobody can scan the
  // own screen. The page comes back to find the ticket in sessionStorage.
  async function leave(stop, signal) {
    const ticket = sessionStorage.getItem("wxscan");
    if (ticket) {
      const answer = await poll(ticket, signal);
      sessionStorage.removeItem("wxscan");
      sessionStorage.removeItem("wxscan-page");
      if (answer.login) return answer;
      await stop(words.unfinished, words.retry);
    }
    const qr = await ask("/wechat/getauthqr", signal);
    sessionStorage.setItem("wxscan", qr.ticket);
    sessionStorage.setItem("wxscan-page", location.href);
    location.assign(qr.url);
    return new Promise(() => {});
  }

  // welcome shows who is logged in, and returns where to go from there, if anywhere.
  function welcome(element, box, who) {
    const { returnTo } = element.dataset;
    const to = returnTo && new URL(returnTo, location);
    const safe = to && to.origin === location.origin && to;
    const logOut = () => fetch(base + "/wechat/logout", { method: "POST" }).then(() => {
      delete element.dataset.openid;
      start(element);
    }, () => box.say(words.error));
    const next = safe && make("a", "wxscan-main", { href: safe, textContent: words.goOn });
    box.who(who, isOurs ? [next, button("wxscan-button", words.logOut, logOut)] : []);
    return safe;
  }

  async function logIn(element, box, offered, at, signal) {
    for (let answer, renewed = 0, failed = 0; !signal.aborted;) {
      const way = ways[offered[at]], note = failed && words.instead;
      const another = offered.length > 1 && button("wxscan-link", words.another, () => start(element, at + 1));
      const stop = (...how) => box.stop(signal, another, ...how);
      if (!renewed) box.look("wxscan-loading", [], []); // else the old code stays until the new one is there
      box.say(words.loading);
      try {
        if (inWeChat && way === ways.auth) answer = await leave(stop, signal);
        else answer = await scan(box, way, note, another, () => start(element, at), signal);
      } catch (err) {
        if (signal.aborted) return;
        if (/^wechat_/.test(err.code) && ++failed < offered.length) {
          at = (at + 1) % offered.length;
          continue;
        }
        renewed = failed = 0;
        const pressed = stop(words[err.code] || words.error, words.retry);
        await (["lost", "store_unavailable"].includes(err.code) ? Promise.race([pressed, sleep(10e3, signal)]) : pressed);
        continue;
      }
      if (signal.aborted) return;
      if (answer.login) {
        const target = welcome(element, box, answer);
        element.dispatchEvent(new CustomEvent("wxscan:login", { bubbles: true, detail: answer }));
        if (target) location.assign(target);
        return;
      }
      const isOld = answer.status === "expired";
      const pressed = isOld ? stop(words.expired, words.refresh, true) : stop(words.declined, words.retry);
      if (!isOld || ++renewed > 3) await pressed; // else it goes on by itself: somebody seems to be there
    }
  }

  // start begins a login anew: in the way that is number at, or in the one that
  // suits, for a link can be opened where nothing can be scanned.
  const boxes = new WeakMap();
  function start(element, at) {
    const offered = (element.dataset.wxscan || "").split(",").filter((name) => name in ways);
    if (!offered.length) offered.push("scan");
    at ??= onPhone || inWeChat ? Math.max(0, offered.indexOf("auth")) : 0;
    const box = boxes.get(element) || new Box(element);
    boxes.set(element, box);
    box.control.abort();
    box.control = new AbortController();
    if (element.dataset.openid) welcome(element, box, element.dataset);
    else logIn(element, box, offered, at % offered.length, box.control.signal);
  }

  // Our own pages.
  function page() {
    document.documentElement.lang = language;
    document.title = document.querySelector("h1").innerText;
    const choice = make("nav", "wxscan-languages", { ariaLabel: "语言 Language" });
    for (const [lang, name] of Object.entries(languages)) {
      const cookie = `wxscan_language=${lang}; path=/; max-age=31536000; samesite=lax`;
      const press = () => { document.cookie = cookie; location.reload(); };
      choice.append(Object.assign(button("", name, press), { lang, ariaPressed: lang === language }));
    }
    if (self === top) document.body.append(choice); // the demo's phone goes by the page around it
    const { wxscanResult } = document.body.dataset;
    const left = wxscanResult && sessionStorage.getItem("wxscan"); // the ticket that this tab left with
    const own = ({ number }) => { document.querySelector(".wxscan-own b").textContent = number; }; // no other page does
    if (wxscanResult === "done" && left) location.replace(sessionStorage.getItem("wxscan-page"));
    if (wxscanResult === "confirm") {
      addEventListener("touchstart", () => {}); // without a listener, iOS has no :active
      if (left) poll(left, new AbortController().signal).then(own, () => {});
    }
    if (wxscanResult === "failed") {
      const reason = CSS.escape(new URLSearchParams(location.search).get("reason"));
      const match = document.querySelector(`[data-reason="${reason}"]`);
      if (match) document.querySelectorAll("[data-reason]").forEach((p) => { p.hidden = p !== match; });
    }
  }

  function run() {
    if (isOurs) page();
    else document.head.append(make("link", "", { rel: "stylesheet", href: base + "/static/wxscan.css" }));
    document.querySelectorAll("[data-wxscan]").forEach((element) => start(element));
  }
  if (document.readyState === "loading") addEventListener("DOMContentLoaded", run);
  else run();
})();

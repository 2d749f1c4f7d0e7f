package main

import (
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"hash/crc32"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// An asker is the browser that asked for a ticket, as the phone is told before
// it confirms: who is shown a code by a stranger can see that it is not their own.
type asker struct {
	Browser string // and system, such as "Firefox, Windows"
	Address string
}

// asker returns who makes a request, by its User-Agent and address; nothing
// unless logins are to be confirmed.
func (s *server) asker(r *http.Request) asker {
	if !s.config.confirm {
		return asker{}
	}
	known := func(names ...string) string { // pairs: what the agent says, what it means
		for i := 0; i < len(names); i += 2 {
			if strings.Contains(r.UserAgent(), names[i]) {
				return names[i+1]
			}
		}
		return ""
	}
	// The makers of browsers let them claim to be Chrome and Safari too.
	browser := cmp.Or(known("MicroMessenger", "WeChat", "QQBrowser", "QQ", "QQ/", "QQ", "Quark", "Quark", "UCBrowser", "UC",
		"UBrowser", "UC", "QihooBrowser", "360", "360SE", "360", "360EE", "360", "MetaSr", "Sogou", "SogouM", "Sogou",
		"baidu", "Baidu", "HuaweiBrowser", "Huawei", "MiuiBrowser", "Xiaomi", "VivoBrowser", "vivo", "HeyTapBrowser", "OPPO",
		"SamsungBrowser", "Samsung", "Edg", "Edge", "OPR/", "Opera", "Firefox", "Firefox", "FxiOS", "Firefox",
		"Chrome", "Chrome", "CriOS", "Chrome", "Safari", "Safari", "curl", "curl"), "Other")
	if system := known("Harmony", "HarmonyOS", "Android", "Android", "iPhone", "iPhone", "iPad", "iPad", "Windows", "Windows",
		"Mac OS", "macOS", "CrOS", "ChromeOS", "Linux", "Linux"); system != "" {
		browser += ", " + system
	}
	return asker{Address: client(r, s.config.trusted).String(), Browser: browser}
}

// holdBack is how long the phone's page must have been shown before its answer
// counts: whoever taps fast on the page before it did not mean this one.
const holdBack = time.Second

// number returns the two digits that stand on the asker's page, for the phone to choose.
func number(key key) string {
	return strconv.Itoa(10 + int(crc32.ChecksumIEEE(key[:])%90))
}

// choices returns the three numbers that the phone chooses from. The s of the
// confirmURL decides which stand beside the right one, and in what order: so they
// are the same at every look, and whoever asked for the ticket cannot know where
// the right one will be.
func choices(k key, sent string) []string {
	random := rand.New(rand.NewChaCha8(sha256.Sum256([]byte(sent))))
	numbers := []string{number(k)}
	for len(numbers) < 3 {
		if n := strconv.Itoa(10 + random.IntN(90)); !slices.Contains(numbers, n) {
			numbers = append(numbers, n)
		}
	}
	random.Shuffle(len(numbers), func(i, j int) { numbers[i], numbers[j] = numbers[j], numbers[i] })
	return numbers
}

// confirmURL returns where the phone confirms the login that a ticket, by its
// key, waits for.
func (s *server) confirmURL(k key, ticket record) string {
	return s.config.publicURL + "/wechat/confirm?s=" + k.String() + s.confirmSecret(k, ticket, s.config.sessionSecrets[0])
}

// confirmSecret returns what the phone alone knows, to decide about a login: a
// MAC of ticket and person, so that nothing need be kept.
func (s *server) confirmSecret(k key, ticket record, sessionSecret string) string {
	return hex.EncodeToString(mac(sessionSecret, "confirm "+k.String()+" "+ticket.Login.OpenID)[:16])
}

// toConfirm returns the ticket that the s of a confirmURL may decide about. ok is
// false if there is none, or it waits for no decision.
func (s *server) toConfirm(ctx context.Context, sent string) (k key, ticket record, ok bool, err error) {
	id := sent[:min(len(sent), 2*len(k))]
	k = parseKey(id)
	ticket, err = s.tickets.look(ctx, k)
	if err != nil || ticket.Status != statusScanned {
		return k, ticket, false, err
	}
	for _, sessionSecret := range s.config.sessionSecrets { // the one before, where it is being changed
		ok = hmac.Equal([]byte(sent[len(id):]), []byte(s.confirmSecret(k, ticket, sessionSecret))) || ok
	}
	return k, ticket, ok, nil
}

// askPhone shows the phone what it is about to log in. It changes nothing, so
// that a preview of the link does no harm.
func (s *server) askPhone(w http.ResponseWriter, r *http.Request) error {
	sent := r.URL.Query().Get("s")
	k, ticket, ok, err := s.toConfirm(r.Context(), sent)
	if !ok {
		reason := "expired"
		if err != nil {
			reason = "unavailable"
		}
		http.Redirect(w, r, "/static/html/loginfailed.html?reason="+reason, http.StatusSeeOther)
		return nil
	}
	numbers := choices(k, sent)
	return s.config.writePage(w, http.StatusOK, "static/html/confirm.html",
		"Site", s.config.site(), "Host", site(s.config.publicURL).Host,
		"First", numbers[0], "Second", numbers[1], "Third", numbers[2],
		"Secret", sent, "Shown", strconv.FormatInt(time.Now().UnixMilli(), 10),
		"Browser", ticket.Asker.Browser, "Address", cmp.Or(ticket.Asker.Address, "?"))
}

// hearPhone takes the phone's answer, which counts once: the right number logs
// in; another of the three, or no, declines. What comes too soon, or is no answer
// to the page, decides nothing, and the page is shown again.
func (s *server) hearPhone(w http.ResponseWriter, r *http.Request) error {
	r.Body = http.MaxBytesReader(w, r.Body, maxBody)
	sent, answer := r.PostFormValue("s"), r.PostFormValue("answer")
	k, _, ok, err := s.toConfirm(r.Context(), sent)
	if ok && err == nil {
		shown, malformed := strconv.ParseInt(r.PostFormValue("shown"), 10, 64)
		soon := malformed != nil || time.Since(time.UnixMilli(shown)) < holdBack
		if soon || answer != "no" && !slices.Contains(choices(k, sent), answer) {
			http.Redirect(w, r, "/wechat/confirm?s="+sent, http.StatusSeeOther)
			return nil
		}
		ok, err = s.tickets.decide(r.Context(), k, answer == number(k))
	}
	target := "/static/html/loginsucceed.html"
	switch {
	case err != nil:
		target = "/static/html/loginfailed.html?reason=unavailable"
	case !ok:
		target = "/static/html/loginfailed.html?reason=expired"
	case answer == "no":
		target = "/static/html/loginfailed.html?reason=declined"
	case answer != number(k):
		target = "/static/html/loginfailed.html?reason=number"
	}
	http.Redirect(w, r, target, http.StatusSeeOther)
	return nil
}

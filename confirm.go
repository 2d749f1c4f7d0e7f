package main

import (
	"cmp"
	"hash/crc32"
	"net/http"
	"strconv"
	"strings"
)

// An asker is the browser that asked for a ticket, as the phone is told before
// it confirms: who is shown a code by a stranger can see that it is not their own.
type asker struct {
	browser string // and system, such as "Firefox, Windows"
	address string
}

// asker returns who makes a request, by its User-Agent and address; nil if
// nobody is to be told.
func (s *server) asker(r *http.Request) *asker {
	if !s.config.confirm {
		return nil
	}
	first := func(names ...string) string { // pairs: what the agent says, what it means
		for i := 0; i < len(names); i += 2 {
			if strings.Contains(r.UserAgent(), names[i]) {
				return names[i+1]
			}
		}
		return "?"
	}
	address, _ := client(r, s.config.trusted)
	return &asker{address: address,
		browser: first("MicroMessenger", "WeChat", "Edg", "Edge", "OPR/", "Opera", "Firefox", "Firefox", "Chrome", "Chrome", "Safari", "Safari", "curl", "curl") + ", " +
			first("Android", "Android", "iPhone", "iPhone", "iPad", "iPad", "Windows", "Windows", "Mac OS", "macOS", "CrOS", "ChromeOS", "Linux", "Linux")}
}

// number returns the two digits that stand on the asker's page and on the phone.
func number(key key) string {
	return strconv.Itoa(10 + int(crc32.ChecksumIEEE(key[:])%90))
}

// confirmURL returns where the phone confirms a login; "" if none waits for that.
func (s *server) confirmURL(t *ticket) string {
	st, _ := s.tickets.look(t)
	if st.status != statusScanned {
		return ""
	}
	return s.config.publicURL + "/wechat/confirm?s=" + t.key.String() + st.secret
}

// splitSecret returns the ticket, nil if there is none, and the secret that are
// the s of confirmURL.
func (s *server) splitSecret(sent string) (t *ticket, secret string) {
	id := sent[:min(len(sent), 2*len(key{}))]
	return s.tickets.find(parseKey(id)), sent[len(id):]
}

// askPhone shows the phone what it is about to log in. It changes nothing, so
// that a preview of the link does no harm.
func (s *server) askPhone(w http.ResponseWriter, r *http.Request) error {
	sent := r.URL.Query().Get("s")
	t, secret := s.splitSecret(sent)
	if !s.tickets.holds(t, secret) {
		http.Redirect(w, r, "/static/html/loginfailed.html?reason=expired", http.StatusSeeOther)
		return nil
	}
	return writePage(w, http.StatusOK, "static/html/confirm.html", "Site", site(s.config.publicURL).Host, "Number", number(t.key), "Secret", sent,
		"Browser", t.asker.browser, "Address", cmp.Or(t.asker.address, "?"))
}

// hearPhone takes the phone's answer. It counts once.
func (s *server) hearPhone(w http.ResponseWriter, r *http.Request) error {
	r.Body = http.MaxBytesReader(w, r.Body, maxBody)
	yes := r.PostFormValue("answer") == "yes"
	t, secret := s.splitSecret(r.PostFormValue("s"))
	target := "/static/html/loginsucceed.html"
	if !s.tickets.decide(t, secret, yes) {
		target = "/static/html/loginfailed.html?reason=expired"
	} else if !yes {
		target = "/static/html/loginfailed.html?reason=declined"
	}
	http.Redirect(w, r, target, http.StatusSeeOther)
	return nil
}

package main

import (
	"bytes"
	"crypto/subtle"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
)

// metrics holds the counters for Prometheus (text format 0.0.4).
type metrics struct {
	mu     sync.Mutex     // guards counts
	counts map[string]int // by series
}

// count adds one to a series, such as wxscan_tickets_total{flow="scan"}.
func (m *metrics) count(format string, args ...any) {
	series := fmt.Sprintf(format, args...)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.counts[series]++
}

// logStatus logs and counts the new status of a ticket. The first digits of its key
// tie the lines of one login together.
func (s *server) logStatus(k key, r record) {
	if s.logLimit.allows(string(r.Status)) {
		s.log.Info("login "+string(r.Status), "login", k.String()[:8], "flow", r.Flow)
	}
	switch r.Status {
	case statusPending:
		s.metrics.count("wxscan_tickets_total{flow=%q}", r.Flow)
	case statusDone, statusDeclined, statusExpired:
		s.metrics.count("wxscan_logins_total{flow=%q,outcome=%q}", r.Flow, r.Status)
	}
}

// showMetrics answers with all metrics, if the request has METRICS_TOKEN. A loopback
// peer proves nothing: it may be a proxy, for anybody.
func (s *server) showMetrics(w http.ResponseWriter, r *http.Request) error {
	token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if want := s.config.metricsToken; want == "" || subtle.ConstantTimeCompare([]byte(token), []byte(want)) != 1 {
		return errNothingHere
	}
	m := &s.metrics
	m.mu.Lock()
	values := maps.Clone(m.counts)
	m.mu.Unlock()
	values["wxscan_waiting_browsers"] = s.parked.count()
	values["wxscan_access_token_age_seconds"] = int(s.wechat.tokenAge().Seconds())
	if s.redis == nil {
		values["wxscan_live_tickets"] = int(s.local.count.Load())
	}
	if !errors.Is(s.tickets.records.ready(), errStoreUnavailable) {
		values["wxscan_store_up"] = 1
	} else {
		values["wxscan_store_up"] = 0
	}
	var page bytes.Buffer
	for _, metric := range []struct{ name, kind, help string }{
		{"wxscan_tickets_total", "counter", "Logins begun, by flow: QR codes, digits, codes sent."},
		{"wxscan_logins_total", "counter", "Ends of logins, by flow and outcome."},
		{"wxscan_wechat_calls_total", "counter", "Calls of WeChat's API, by path and result."},
		{"wxscan_waiting_browsers", "gauge", "Polls that wait for a scan."},
		{"wxscan_live_tickets", "gauge", "Tickets that wait, or whose result can be read: without Redis."},
		{"wxscan_store_up", "gauge", "1 while logins can be kept, 0 while Redis is away."},
		{"wxscan_access_token_age_seconds", "gauge", "Age of the access token; 0 without one."},
	} {
		fmt.Fprintf(&page, "# HELP %[1]s %[3]s\n# TYPE %[1]s %[2]s\n", metric.name, metric.kind, metric.help)
		for _, series := range slices.Sorted(maps.Keys(values)) {
			if name, _, _ := strings.Cut(series, "{"); name == metric.name {
				fmt.Fprintln(&page, series, values[series])
			}
		}
	}
	return write(w, http.StatusOK, "text/plain; version=0.0.4; charset=utf-8", page.Bytes())
}

func (s *server) health(w http.ResponseWriter, r *http.Request) error {
	return write(w, http.StatusOK, plainText, []byte("ok"))
}

// ready tells a balancer whether logins can be kept: with REDIS_URL they cannot
// while Redis is away.
func (s *server) ready(w http.ResponseWriter, r *http.Request) error {
	if err := s.tickets.records.ready(); errors.Is(err, errStoreUnavailable) {
		return err
	}
	return s.health(w, r)
}
